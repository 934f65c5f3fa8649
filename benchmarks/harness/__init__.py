"""How everything here is measured: alone on the device, by which clock, and the rows that come of it."""
