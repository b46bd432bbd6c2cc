"""What all commands share: options, help, errors, progress and tables."""
