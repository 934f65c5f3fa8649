"""Networks, written once on (primal, tangent) pairs."""
