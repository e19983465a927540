"""What every room uses: errors, files, paths, configs, model sizes, FLOPs, schedules and identities."""
