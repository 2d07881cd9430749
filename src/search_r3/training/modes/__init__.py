"""What is fitted to a trained model for modes beyond `direct` and `reason`."""
