"""The work of a step, counted on meta tensors without computing anything."""
