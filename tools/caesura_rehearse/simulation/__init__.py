"""The rehearsal itself: orders become events, which coordinator, host and metadata service carry out as a fleet would."""
