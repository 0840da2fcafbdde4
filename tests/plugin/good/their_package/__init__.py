"""What a third party adds to edgekit."""
