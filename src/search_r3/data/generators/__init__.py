"""Collections that are made on the user's machine, without a download."""
