"""The command group ``caesura libvirt``: what the domains of this host are to Caesura."""
