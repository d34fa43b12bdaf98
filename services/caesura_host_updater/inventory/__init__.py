"""What a host has: its VMs, its updates, and the inventory that publishes them."""
