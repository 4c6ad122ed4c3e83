"""What templates of XNLI and PAWS-X say, by language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class QuestionWords:
    """Two labelled sentences, a question about them, its answers.

    Attributes:
        first: the label of the first sentence, with what stands between them.
        second: of the second.
        question: what is asked.
        answers: for each candidate.
    """

    first: str
    second: str
    question: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class TagWords:
    """A sentence that asks to be agreed with, and the answer.

    Attributes:
        tag: asks; small letters, its question mark at the end.
        yes: agrees.
        no: does not.
        also: neither; empty where there are but two answers.
        comma: stands in front of the tag and behind the answer.
        gap: stands between question and answer.
    """

    tag: str
    yes: str
    no: str
    also: str
    comma: str = ", "
    gap: str = " "


def _relations(first: str, second: str, question: str, *answers: str) -> QuestionWords:
    names = ("entailment", "contradiction", "neutral")
    return QuestionWords(first, second, question, dict(zip(names, answers, strict=True)))


def _truth(first: str, second: str, question: str, *answers: str) -> QuestionWords:
    return QuestionWords(
        first, second, question, dict(zip(("true", "false"), answers, strict=True))
    )


XNLI: Mapping[str, QuestionWords] = {
    "en": _relations(
        "Paragraph: ", "Question: ", "True, False, or Neither?", "True", "False", "Neither"
    ),
    "ar": _relations(
        "فقرة: ", "سؤال: ", "صحيح أم خطأ أم لا هذا ولا ذاك؟", "صحيح", "خطأ", "لا هذا ولا ذاك"
    ),
    "bg": _relations(
        "Параграф: ", "Въпрос: ", "Вярно, невярно или нито едно от двете?",
        "Вярно", "Невярно", "Нито едно от двете",
    ),
    "de": _relations(
        "Absatz: ", "Frage: ", "Wahr, falsch oder keines von beiden?",
        "Wahr", "Falsch", "Keines von beiden",
    ),
    "el": _relations(
        "Παράγραφος: ", "Ερώτηση: ", "Σωστό, λάθος ή κανένα από τα δύο;",
        "Σωστό", "Λάθος", "Κανένα από τα δύο",
    ),
    "es": _relations(
        "Párrafo: ", "Pregunta: ", "¿Verdadero, falso o ninguno de los dos?",
        "Verdadero", "Falso", "Ninguno de los dos",
    ),
    "fr": _relations(
        "Paragraphe : ", "Question : ", "Vrai, faux ou ni l'un ni l'autre ?",
        "Vrai", "Faux", "Ni l'un ni l'autre",
    ),
    "hi": _relations(
        "अनुच्छेद: ", "प्रश्न: ", "सही, गलत या दोनों में से कोई नहीं?",
        "सही", "गलत", "दोनों में से कोई नहीं",
    ),
    "ru": _relations(
        "Абзац: ", "Вопрос: ", "Верно, неверно или ни то ни другое?",
        "Верно", "Неверно", "Ни то ни другое",
    ),
    "sw": _relations(
        "Aya: ", "Swali: ", "Kweli, uongo, au si yoyote kati ya hayo?",
        "Kweli", "Uongo", "Si yoyote kati ya hayo",
    ),
    "th": _relations(
        "ย่อหน้า: ", "คำถาม: ", "จริง เท็จ หรือไม่ใช่ทั้งสองอย่าง?", "จริง", "เท็จ", "ไม่ใช่ทั้งสองอย่าง"
    ),
    "tr": _relations(
        "Paragraf: ", "Soru: ", "Doğru mu, yanlış mı, hiçbiri mi?", "Doğru", "Yanlış", "Hiçbiri"
    ),
    "ur": _relations(
        "پیراگراف: ", "سوال: ", "درست، غلط یا دونوں میں سے کوئی نہیں؟",
        "درست", "غلط", "دونوں میں سے کوئی نہیں",
    ),
    "vi": _relations(
        "Đoạn văn: ", "Câu hỏi: ", "Đúng, sai hay không phải cả hai?",
        "Đúng", "Sai", "Không phải cả hai",
    ),
    "zh": _relations("段落：", "问题：", "对、错，还是都不是？", "对", "错", "都不是"),
}  # fmt: skip

PAWSX: Mapping[str, QuestionWords] = {
    "en": _truth(
        "Sentence 1: ", "Sentence 2: ",
        "Sentence 1 and Sentence 2 have the same meaning. True or False?", "True", "False",
    ),
    "de": _truth(
        "Satz 1: ", "Satz 2: ",
        "Satz 1 und Satz 2 bedeuten dasselbe. Richtig oder falsch?", "Richtig", "Falsch",
    ),
    "es": _truth(
        "Oración 1: ", "Oración 2: ",
        "La oración 1 y la oración 2 significan lo mismo. ¿Verdadero o falso?",
        "Verdadero", "Falso",
    ),
    "fr": _truth(
        "Phrase 1 : ", "Phrase 2 : ",
        "La phrase 1 et la phrase 2 veulent dire la même chose. Vrai ou faux ?", "Vrai", "Faux",
    ),
    "ja": _truth("文1：", "文2：", "文1と文2は同じ意味です。正しいか、誤りか？", "正しい", "誤り"),
    "ko": _truth(
        "문장 1: ", "문장 2: ",
        "문장 1과 문장 2는 뜻이 같습니다. 참인가요, 거짓인가요?", "참", "거짓",
    ),
    "zh": _truth("句子1：", "句子2：", "句子1和句子2的意思相同。对还是错？", "对", "错"),
}  # fmt: skip

# "right?", "Yes", "No", "Also", word by word.
TAGS_WORD_BY_WORD: Mapping[str, TagWords] = {
    "en": TagWords("right?", "Yes", "No", "Also"),
    "ar": TagWords("صحيح؟", "نعم", "لا", "أيضًا", comma="، "),
    "bg": TagWords("вярно?", "Да", "Не", "Също"),
    "de": TagWords("richtig?", "Ja", "Nein", "Auch"),
    "el": TagWords("σωστά;", "Ναι", "Όχι", "Επίσης"),
    "es": TagWords("¿correcto?", "Sí", "No", "También"),
    "fr": TagWords("correct ?", "Oui", "Non", "Aussi"),
    "hi": TagWords("सही?", "हाँ", "नहीं", "और"),
    "ja": TagWords("正しいですか？", "はい", "いいえ", "また", comma="、", gap=""),
    "ko": TagWords("맞습니까?", "예", "아니요", "또한"),
    "ru": TagWords("правильно?", "Да", "Нет", "Также"),
    "sw": TagWords("sahihi?", "Ndiyo", "Hapana", "Pia"),
    "th": TagWords("ถูกต้องไหม?", "ใช่", "ไม่ใช่", "และ", comma=" "),
    "tr": TagWords("doğru mu?", "Evet", "Hayır", "Ayrıca"),
    "ur": TagWords("صحیح؟", "جی ہاں", "نہیں", "نیز", comma="، "),
    "vi": TagWords("đúng không?", "Có", "Không", "Cũng"),
    "zh": TagWords("正确吗？", "是", "不", "也", comma="，", gap=""),
}

# What a speaker of the language says to be agreed with.
TAGS_IN_USE: Mapping[str, TagWords] = {
    "en": TagWords("right?", "Yes", "No", "Also"),
    "ar": TagWords("أليس كذلك؟", "نعم", "لا", "كذلك", comma="، "),
    "bg": TagWords("нали?", "Да", "Не", "Освен това"),
    "de": TagWords("oder?", "Ja", "Nein", "Außerdem"),
    "el": TagWords("έτσι δεν είναι;", "Ναι", "Όχι", "Επιπλέον"),
    "es": TagWords("¿verdad?", "Sí", "No", "Además"),
    "fr": TagWords("n'est-ce pas ?", "Oui", "Non", "De plus"),
    "hi": TagWords("है ना?", "हाँ", "नहीं", "साथ ही"),
    "ja": TagWords("そうですよね？", "はい", "いいえ", "また", comma="、", gap=""),
    "ko": TagWords("그렇죠?", "네", "아니요", "게다가"),
    "ru": TagWords("не так ли?", "Да", "Нет", "Кроме того"),
    "sw": TagWords("sivyo?", "Ndiyo", "Hapana", "Vilevile"),
    "th": TagWords("ใช่ไหม?", "ใช่", "ไม่ใช่", "นอกจากนี้", comma=" "),
    "tr": TagWords("değil mi?", "Evet", "Hayır", "Üstelik"),
    "ur": TagWords("ہے نا؟", "ہاں", "نہیں", "اس کے علاوہ", comma="، "),
    "vi": TagWords("phải không?", "Phải", "Không", "Ngoài ra"),
    "zh": TagWords("对吧？", "是的", "不", "而且", comma="，", gap=""),
}
