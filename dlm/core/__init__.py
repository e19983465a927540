"""The modules that every room uses: errors, files, paths, configs, model sizes, FLOPs, schedules and identities."""
