"""Plans that were tried: candidates for one budget, each corrected on few images and measured on others."""
