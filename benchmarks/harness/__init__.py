"""How everything is measured: alone on the device, by which clock, and the rows of results."""
