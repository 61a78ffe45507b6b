"""Image-text pairs and clips: manifests, shards, decoding, sampling, order."""
