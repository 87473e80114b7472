"""Images from noise, by a U-Net of convolutional experts."""
