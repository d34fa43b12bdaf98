"""azure-identity, unmodified: asks for a token of a VM that has no identity."""

import json

from azure.identity import ManagedIdentityCredential

try:
    ManagedIdentityCredential().get_token("https://vault.azure.net/.default")
    print(json.dumps({"token": True}))
except Exception as error:
    print(json.dumps({"name": type(error).__name__, "message": str(error)}))
