"""The Avro schema 4.02 of ZTF's alert packets: names, types and order of the fields as the survey sends them.

Each word below is one field, `name:type`; `?` marks a field that may be null.
"""

from __future__ import annotations

from typing import Any

VERSION = "4.02"
TYPES = {"d": "double", "f": "float", "i": "int", "l": "long", "s": "string"}

# The fields of a detection, both as the candidate and in the history. In the history, the fields in NULL_IN_HISTORY may
# be null.
DETECTION = """jd:d fid:i pid:l diffmaglim:f? pdiffimfilename:s? programpi:s? programid:i candid:l isdiffpos:s tblid:l?
nid:i? rcid:i? field:i? xpos:f? ypos:f? ra:d dec:d magpsf:f sigmapsf:f chipsf:f? magap:f? sigmagap:f? distnr:f? magnr:f?
sigmagnr:f? chinr:f? sharpnr:f? sky:f? magdiff:f? fwhm:f? classtar:f? mindtoedge:f? magfromlim:f? seeratio:f? aimage:f?
bimage:f? aimagerat:f? bimagerat:f? elong:f? nneg:i? nbad:i? rb:f? ssdistnr:f? ssmagnr:f? ssnamenr:s? sumrat:f?
magapbig:f? sigmagapbig:f? ranr:d decnr:d"""
NULL_IN_HISTORY = ("candid", "isdiffpos", "ra", "dec", "magpsf", "sigmapsf", "ranr", "decnr")
CANDIDATE = """sgmag1:f? srmag1:f? simag1:f? szmag1:f? sgscore1:f? distpsnr1:f? ndethist:i ncovhist:i jdstarthist:d?
jdendhist:d? scorr:d? tooflag:i? objectidps1:l? objectidps2:l? sgmag2:f? srmag2:f? simag2:f? szmag2:f? sgscore2:f?
distpsnr2:f? objectidps3:l? sgmag3:f? srmag3:f? simag3:f? szmag3:f? sgscore3:f? distpsnr3:f? nmtchps:i rfid:l
jdstartref:d jdendref:d nframesref:i rbversion:s dsnrms:f? ssnrms:f? dsdiff:f? magzpsci:f? magzpsciunc:f? magzpscirms:f?
nmatches:i clrcoeff:f? clrcounc:f? zpclrcov:f? zpmed:f? clrmed:f? clrrms:f? neargaia:f? neargaiabright:f? maggaia:f?
maggaiabright:f? exptime:f? drb:f? drbversion:s"""
HISTORY = "scorr:d? magzpsci:f? magzpsciunc:f? magzpscirms:f? clrcoeff:f? clrcounc:f? rbversion:s"
FORCED = """field:i? rcid:i? fid:i pid:l rfid:l sciinpseeing:f? scibckgnd:f? scisigpix:f? magzpsci:f? magzpsciunc:f?
magzpscirms:f? clrcoeff:f? clrcounc:f? exptime:f? adpctdif1:f? adpctdif2:f? diffmaglim:f? programid:i jd:d
forcediffimflux:f? forcediffimfluxunc:f? procstatus:s? distnr:f? ranr:d decnr:d magnr:f? sigmagnr:f? chinr:f?
sharpnr:f?"""


def ztf_schema() -> dict[str, Any]:
    """Return the schema as JSON data, ready for an Avro writer."""
    history = " ".join(
        word + "?" if word.split(":")[0] in NULL_IN_HISTORY and not word.endswith("?") else word
        for word in DETECTION.split()
    )
    cutout = _record("cutout", [_field("fileName", "string"), _field("stampData", "bytes")])
    return _record(
        "alert",
        [
            *_fields("schemavsn:s publisher:s objectId:s candid:l"),
            _field("candidate", _record("candidate", _fields(f"{DETECTION} {CANDIDATE}"), "ztf.alert")),
            _nullable_array("prv_candidates", _record("prv_candidate", _fields(f"{history} {HISTORY}"), "ztf.alert")),
            _nullable_array("fp_hists", _record("fp_hist", _fields(FORCED), "ztf.alert")),
            _nullable("cutoutScience", {**cutout, "namespace": "ztf.alert"}),
            _nullable("cutoutTemplate", "ztf.alert.cutout"),
            _nullable("cutoutDifference", "ztf.alert.cutout"),
        ],
    )


def _record(name: str, fields: list[dict[str, Any]], namespace: str = "ztf") -> dict[str, Any]:
    return {"type": "record", "name": name, "namespace": namespace, "version": VERSION, "fields": fields}


def _field(name: str, avro_type: Any) -> dict[str, Any]:
    return {"name": name, "type": avro_type}


def _nullable(name: str, avro_type: Any) -> dict[str, Any]:
    return {"name": name, "type": ["null", avro_type], "default": None}


def _nullable_array(name: str, items: Any) -> dict[str, Any]:
    return _nullable(name, {"type": "array", "items": items})


def _fields(words: str) -> list[dict[str, Any]]:
    fields = []
    for word in words.split():
        name, avro_type = word.split(":")
        fields.append((_nullable if avro_type.endswith("?") else _field)(name, TYPES[avro_type[0]]))
    return fields
