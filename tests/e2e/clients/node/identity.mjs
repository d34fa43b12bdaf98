// @azure/identity, unmodified: asks for a token of a VM that has no identity.
import { ManagedIdentityCredential } from "@azure/identity";

try {
  await new ManagedIdentityCredential().getToken("https://vault.azure.net/.default");
  console.log(JSON.stringify({ token: true }));
} catch (error) {
  console.log(JSON.stringify({ name: error.name, message: String(error.message) }));
}
