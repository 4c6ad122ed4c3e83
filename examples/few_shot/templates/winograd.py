"""Templates of Winograd schemas: the sentence with an answer in place of its pronoun."""

from __future__ import annotations

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate
from examples.few_shot.templates.text import capitalised

# Begin answers with a large letter in the files, wherever the pronoun stands.
_DETERMINERS = {
    *("a", "an", "the", "my", "his", "her", "its", "our", "their", "these", "this"),
    *("le", "la", "les", "un", "une", "des", "son", "sa", "ses", "o", "os", "as", "um", "uma"),
}
_POSSESSIVE = {"my", "his", "its", "our", "their", "your"}
_NO_NOUNS = {"to", "the", "a", "her", "and", "because"}


@TEMPLATES.register("winogrande")
class WinograndeTemplate(FewShotTemplate):
    """The sentence with the answer in its gap."""

    def encode(self, sample: FewShotSample) -> str:
        return f"{sample['txt1']}{MASK}{sample['txt2']}"


@TEMPLATES.register("winograd")
class WinogradTemplate(WinograndeTemplate):
    """As winogrande; the answer takes the pronoun's case: its first letter, and the English 's."""

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        pronoun = str(sample["pron"])
        if not pronoun:
            return candidate
        if pronoun[0].isupper():
            candidate = capitalised(candidate)
        elif candidate.split(" ")[0].lower() in _DETERMINERS:
            candidate = candidate[0].lower() + candidate[1:]
        if sample.get("lang", "en") == "en" and self._possessive(pronoun.lower(), sample["txt2"]):
            candidate += "'" if candidate.endswith("s") else "'s"
        return candidate

    @staticmethod
    def _possessive(pronoun: str, behind: str) -> bool:
        """Whether a noun belongs to the pronoun; of "her" only what follows tells."""
        word = behind.split()[0] if behind.strip() else ""
        follows = word.isalpha() and word not in _NO_NOUNS
        return pronoun in _POSSESSIVE or (pronoun == "her" and follows)
