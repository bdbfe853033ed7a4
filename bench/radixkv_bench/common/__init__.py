"""What the benches share: commands, options, models, clocks, files and pictures."""
