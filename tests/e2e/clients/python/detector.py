"""opentelemetry-resource-detector-azure, unmodified: says which VM this is."""

import json

from opentelemetry.resource.detector.azure.vm import AzureVMResourceDetector

print(json.dumps(dict(AzureVMResourceDetector().detect().attributes)))
