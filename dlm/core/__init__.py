"""Words that every room shares: errors, files, paths, configs, sizes, FLOPs, schedules and identities."""
