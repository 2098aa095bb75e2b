"""The paper: geometry, keypoint maps, masks, weights and losses."""
