"""Tensors in, tensors out: pieces that two systems or more share."""
