"""What is measured once per model and then used by selection and retention methods."""

from kvloom.engine.calibration.razor import HeadClasses, RazorCalibration, find_razor, save_razor
from kvloom.engine.calibration.tidal import TidalCalibration, TidalChoice, find_tidal, save_tidal

__all__ = [
    "HeadClasses",
    "RazorCalibration",
    "TidalCalibration",
    "TidalChoice",
    "find_razor",
    "find_tidal",
    "save_razor",
    "save_tidal",
]
