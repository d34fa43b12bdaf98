"""msal, unmodified: the same."""

import json

import msal
import requests

client = msal.ManagedIdentityClient(msal.SystemAssignedManagedIdentity(), http_client=requests.Session())
print(json.dumps(client.acquire_token_for_client(resource="https://vault.azure.net")))
