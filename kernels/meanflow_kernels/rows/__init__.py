"""What the operators on rows (B, L, C) share: a row's device functions, its launches, configs and checks."""
