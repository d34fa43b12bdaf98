"""Networks of programs: namespaces, the way out, addresses and ports."""
