"""Needles of text, images, video and sound in one sequence."""
