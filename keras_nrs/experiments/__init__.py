"""The experiments behind the commands `keras-nrs demo`, `train`, `sweep`, `report`."""
