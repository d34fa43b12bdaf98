// @opentelemetry/resource-detector-azure, unmodified: says which VM this is.
import { azureVmDetector } from "@opentelemetry/resource-detector-azure";

const found = azureVmDetector.detect();
const entries = await Promise.all(Object.entries(found.attributes).map(async ([name, value]) => [name, await value]));
console.log(JSON.stringify(Object.fromEntries(entries)));
