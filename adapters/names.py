"""The names of the methods: members of a str-Enum, as peft's PeftType has them for its own."""

from enum import Enum


class AdapterType(str, Enum):
    """Importable by its name, so that a configuration can be pickled."""

    ALIGNGUARD = "ALIGNGUARD"
    ALLORA = "ALLORA"
    BALORA = "BALORA"
    DSEE = "DSEE"
    INTRINSICDIMENSION = "INTRINSICDIMENSION"
    LORAXS = "LORAXS"
    LORASB = "LORASB"
    MASKTUNING = "MASKTUNING"
    PST = "PST"
    SOKA = "SOKA"
    SORSA = "SORSA"
    SPP = "SPP"
    SVFIT = "SVFIT"
