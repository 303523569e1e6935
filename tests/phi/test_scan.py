"""What is found: every category in the forms that tell it, and what must stay."""

import pytest

from attending.phi import scan


def found(text: str) -> list[tuple[str, str]]:
    return [(span.category, text[span.start : span.end]) for span in scan(text)]


CASES = [
    ("name", "Patient Name: Amara Okonkwo, seen today.", "Amara Okonkwo"),
    ("name", "I spoke with Dr. Vandersloot about it.", "Vandersloot"),
    ("name", "患者姓名：欧阳雪梅    性别：女", "欧阳雪梅"),
    ("name", "陪同：买买提·吐尔逊，已签字", "买买提·吐尔逊"),
    ("location", "lives at 12 Oak Street, Apt 4, Springfield, IL 62704.", "12 Oak Street, Apt 4"),
    ("location", "家住江苏省南京市鼓楼区中山路18号。", "中山路18号"),
    ("date", "Admitted March 3rd, 2021 for pneumonia.", "March 3rd, 2021"),
    ("date", "seen 2021-03-04 in clinic", "2021-03-04"),
    ("date", "DOB: 13/05/1962", "13/05/1962"),
    ("date", "于2023年5月6日入院", "2023年5月6日"),
    ("date", "农历八月十五起病", "农历八月十五"),
    ("age", "A 94-year-old woman", "94"),
    ("age", "患者，男，93岁", "93"),
    ("phone", "Call (555) 123-4567 ext. 12 after five", "(555) 123-4567 ext. 12"),
    ("phone", "手机 138-1234-5678", "138-1234-5678"),
    ("phone", "座机010-62345678转605", "010-62345678转605"),
    ("phone", "电话是幺三八零零幺三八零零零", "幺三八零零幺三八零零零"),
    ("fax", "Fax: 555-987-6543", "555-987-6543"),
    ("email", "write to a.lee@clinic.example please", "a.lee@clinic.example"),
    ("ssn", "SSN 123-45-6789", "123-45-6789"),
    ("mrn", "MRN: 00123456", "00123456"),
    ("mrn", "住院号：ZY20231234", "ZY20231234"),
    ("health_plan", "Member ID: XYZ123456789", "XYZ123456789"),
    ("health_plan", "医保卡号 A12345678", "A12345678"),
    ("account", "card 4111 1111 1111 1111 on file", "4111 1111 1111 1111"),
    ("license", "DEA AB1234563", "AB1234563"),
    ("vehicle", "VIN 1M8GDM9AXKP042788", "1M8GDM9AXKP042788"),
    ("vehicle", "车牌京A·12345", "京A·12345"),
    ("device", "pump serial number: SN-884213-B", "SN-884213-B"),
    ("url", "see https://portal.clinic.example/p/77 now", "https://portal.clinic.example/p/77"),
    ("ip", "login from 192.168.10.24 failed", "192.168.10.24"),
    ("ip", "mac 00:1A:2B:3C:4D:5E", "00:1A:2B:3C:4D:5E"),
    ("biometric", "fingerprint ID: FP-88213", "FP-88213"),
    ("photo", "photo: IMG_2031.jpg attached", "IMG_2031.jpg"),
    ("id", "Employee ID: E-55321", "E-55321"),
    ("resident_id", "身份证号：11010519491231002X", "11010519491231002X"),
    ("passport", "护照号 E12345678", "E12345678"),
    ("wechat", "微信号：wx_lihua88", "wx_lihua88"),
]


@pytest.mark.parametrize(("category", "text", "part"), CASES)
def test_every_category_is_found_whole(category: str, text: str, part: str) -> None:
    at = text.index(part)
    hidden = {i for span in scan(text) for i in range(span.start, span.end)}
    assert {i for i in range(at, at + len(part)) if text[i].isalnum()} <= hidden
    assert category in [kind for kind, told in found(text) if part in told or told in part]


@pytest.mark.parametrize(
    "text",
    [
        "Parkinson disease was treated with levodopa; a Foley catheter stays.",
        "Continue Janumet 50/1000 twice daily and metformin.",
        "BP 120/80, HR 72, SpO2 98%, strength 5/5 in all groups.",
        "A 64-year-old man with Crohn disease, stable since 2019.",
        "Pump software version 10.2.1.4 was installed.",
        "帕金森病，高血压病3级，予阿司匹林100mg口服。",
        "白细胞 7.5×10^9/L，血红蛋白 120g/L，体温36.5℃。",
        "巴宾斯基征阴性，墨菲征阳性。",
    ],
)
def test_eponyms_drugs_and_values_stay(text: str) -> None:
    assert found(text) == []


def test_a_column_head_tells_what_stands_below_it() -> None:
    text = "Name | MRN | Age\n--- | --- | ---\nLee, Ann | 99123 | 93\nDiaz, Eva | 88412 | 41\n"
    assert ("mrn", "99123") in found(text)
    assert ("mrn", "88412") in found(text)
    assert ("age", "93") in found(text)
    assert "41" not in [part for _, part in found(text)]


def test_a_label_alone_in_its_line_speaks_of_the_next() -> None:
    assert ("mrn", "5550123") in found("Medical record number\n5550123\n")


def test_an_empty_text_has_nothing() -> None:
    assert scan("") == []
    assert scan(" \n\t") == []
