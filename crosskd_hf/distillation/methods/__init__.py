"""Distillation methods, one file for each. Importing a configuration here puts it into :data:`METHODS`."""

from ..method import METHODS as METHODS
from ..method import register
from .crosskd import CrossKD as CrossKD
from .defeat import DeFeat as DeFeat
from .fgd import FGD as FGD
from .fine_grained import FineGrained as FineGrained
from .fitnets import FitNets as FitNets
from .gid import GID as GID
from .inside_gt import InsideGT as InsideGT
from .kd import KD as KD
from .ld import LD as LD
from .main_region import MainRegion as MainRegion
from .pkd import PKD as PKD
from .skd import SKD as SKD

register(globals().values())
