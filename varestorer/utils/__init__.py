"""Small parts that every other layer may use: errors, seeds, images, files, devices."""
