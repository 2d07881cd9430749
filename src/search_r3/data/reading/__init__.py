"""What is not a collection yet: files of any kind and tables, read as texts, and texts cut into chunks."""
