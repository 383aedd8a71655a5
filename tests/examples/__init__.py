import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(FOLDER))
