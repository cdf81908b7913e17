"""Fast operations on plain arrays. They know nothing of models or training and import nothing above them."""
