"""Identifiers that the Hub knows: licences and languages of a model card's metadata.

It refuses a card whose licence it does not know, and shows an error on the page of one with another language, so both
are checked here first, without network. The licences are those that its own message lists in November 2026.
"""

import difflib


LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()
)
# ISO 639-1, and what older lists call Hebrew, Indonesian, Yiddish, Moldovan, Serbo-Croatian and the Bihari languages.
TWO_LETTERS = frozenset(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik in io is it iu iw
    ja ji jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mo mr ms mt my
    na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn
    so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """.split()
)
SPECIAL_LANGUAGES = ("code", "multilingual")


def license_problem(name) -> str | None:
    """Why the Hub would refuse a licence's identifier; None if it would not."""
    if name in LICENSES:
        return None
    if not isinstance(name, str):
        return f"license is {name!r}, wanted one identifier of the Hub, such as apache-2.0"
    near = difflib.get_close_matches(name.lower().replace(" ", "-").replace("_", "-"), LICENSES, n=3)
    return f"license {name!r} is none of the Hub's ({', '.join(near) or 'apache-2.0, mit, ...'}; otherwise: other)"


def language_problem(names) -> str | None:
    """Why the Hub would not know a card's language, one or a list; None if it would. Three letters are taken as they
    come: ISO 639-3 has seven thousand.
    """
    for name in names if isinstance(names, list | tuple) else [names]:
        is_code = isinstance(name, str) and name.isascii() and name.isalpha() and name.islower()
        if not is_code or not (name in TWO_LETTERS or len(name) == 3 or name in SPECIAL_LANGUAGES):
            hint = " (YAML reads a bare no as false: quote it)" if name is False else ""
            return f"language {name!r} is no code of the Hub's, such as en, deu, code or multilingual{hint}"
    return None
