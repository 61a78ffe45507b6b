"""The model: image encoder, attentional poolers, text decoders, CoCa, and the video classifier."""
