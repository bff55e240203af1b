"""The engine backends behind one seam, a pipeline."""
