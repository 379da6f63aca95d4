"""What the words of a reply tell about the health of the model that wrote it. Pure Python: no torch, no model."""
