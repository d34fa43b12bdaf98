"""The code that runs inside the guest: shipped as data, started there as the package ``caesura_guest``.

Standard library only, and little of it: under TCG an import takes ten times as long.
"""
