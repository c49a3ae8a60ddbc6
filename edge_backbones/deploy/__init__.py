"""Work on a finished bundle where it runs: compile engines for this machine, verify them and time them."""
