"""MeanFlow itself: times, objective, which samples need which pass, sampling."""
