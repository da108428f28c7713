"""What is measured once per model and then used by selection methods."""

from kvloom.engine.calibration.tidal import TidalCalibration, TidalChoice, find_tidal, save_tidal

__all__ = ["TidalCalibration", "TidalChoice", "find_tidal", "save_tidal"]
