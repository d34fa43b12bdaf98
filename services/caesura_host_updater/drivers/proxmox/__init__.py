"""The ``proxmox`` driver: VMs of a Proxmox VE node, paused and resumed by QMP beside Proxmox's own tools."""
