"""Packets of ZTF and LSST as dictionaries, with only the fields that are read, and the flux of a magnitude by its
definition."""

import math


def ztf_row(jd=2_459_000.5, fid=1, magpsf=20.0, sigmapsf=0.1, isdiffpos="t"):
    return {"jd": jd, "fid": fid, "magpsf": magpsf, "sigmapsf": sigmapsf, "isdiffpos": isdiffpos}


def ztf_forced(jd=2_459_001.5, fid=1, flux=100.0, error=10.0, zero_point=26.0, status="0"):
    return {
        "jd": jd,
        "fid": fid,
        "forcediffimflux": flux,
        "forcediffimfluxunc": error,
        "magzpsci": zero_point,
        "procstatus": status,
    }


def ztf(candidate=None, history=(), **extra):
    return {
        "objectId": "ZTF24aaaaaaa",
        "candid": 123,
        "candidate": candidate or ztf_row(),
        "prv_candidates": list(history),
    } | extra


def lsst_row(time=61_000.0, band="r", flux=1000.0, error=50.0, **extra):
    return {"midpointMjdTai": time, "band": band, "psfFlux": flux, "psfFluxErr": error} | extra


def lsst_packet(history=(), forced=(), **source):
    ids = {"diaSourceId": 7, "diaObjectId": 5, "ssObjectId": 0}
    return {
        "diaSource": lsst_row(**(ids | source)),
        "prvDiaSources": list(history),
        "prvDiaForcedSources": list(forced),
    }


def flux_of_magnitude(magnitude):
    """The definition m = 27.5 - 2.5 log10 f, solved in another form than in the module."""
    return math.exp((27.5 - magnitude) / 2.5 * math.log(10))
