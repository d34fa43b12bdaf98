"""What is paused: programs, processes, cgroups, containers, and the guards that resume them."""
