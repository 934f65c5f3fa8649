"""What a step has to do, counted on meta tensors without computing anything."""
