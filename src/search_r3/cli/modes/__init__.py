"""Commands around modes beyond `direct` and `reason`."""
