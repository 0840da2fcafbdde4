"""Networks that edgekit trains, compresses and ships."""
