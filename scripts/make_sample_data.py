"""Write the sample data set: generated Chinese advertisements for garments, in the row format of ADGEN.

Usage:
    python scripts/make_sample_data.py [--output_dir data --num_train 3000 --num_dev 200 --seed 42]

Every sentence is made from the templates below; none is from ADGEN. A clause is a frame that names the attribute,
followed by a perk that praises it: "{v}的版型" + "把小肚腩悄悄藏好".
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import one_line_on_interrupt

MIN_CHARS, MAX_CHARS = 60, 140  # characters of an output, the range of most of ADGEN's

# The perks of each attribute group and value. A perk is a predicate whose subject is the attribute.
PERKS = {
    "版型": {
        "宽松": "把小肚腩悄悄藏好 让举手投足毫无束缚 遮肉显瘦两不误 穿起来随性又自在",
        "显瘦": "勾勒出迷人曲线 上身就像轻了五斤 让身形更显高挑 修饰出玲珑身段",
        "立体剪裁": "贴合身形却不紧绷 穿起来有型有款 巧妙修饰身材小瑕疵 撑起利落的轮廓",
    },
    "材质": {
        "棉": "亲肤透气久穿不闷 柔软得像被云朵包裹 贴身穿着格外舒适",
        "雪纺": "轻盈飘逸又透气 随风摆动尽显仙气 贴身穿也清爽舒适",
        "针织": "柔软亲肤有弹性 包裹身体却不紧绷 带来格外温柔的触感",
        "蕾丝": "精致细腻惹人爱 朦胧间尽显女人味 让甜美气质加倍",
        "网纱": "层层轻叠仙气十足 轻薄朦胧自带浪漫 走动间如云似雾",
        "蚕丝": "光泽柔美又亲肤 垂感一流尽显贵气 触感如牛奶般顺滑",
        "亚麻": "透气吸湿自在舒爽 自带质朴的自然气息 越洗越柔软贴心",
        "羊毛": "保暖亲肤不扎人 蓬松轻暖有温度 为你锁住满满暖意",
        "丝绒": "泛着迷人的光泽 手感顺滑显贵气 把精致韵味拉满",
        "混纺": "挺括有型不易皱 耐穿又好打理 兼顾舒适与质感",
    },
    "颜色": {
        "黑色": "神秘显瘦永不过时 怎么搭都不出错 低调里透着高级",
        "白色": "干净清爽提亮气色 纯净如初雪般动人 百搭又显气质",
        "灰色": "低调耐看有格调 内敛中透着高级 百搭不挑人",
        "红色": "热情亮眼衬肤色 让你成为人群焦点 喜庆又显白",
        "粉色": "温柔减龄显气色 甜而不腻惹人爱 衬得脸庞粉嫩动人",
        "蓝色": "清爽干净又显白 像晴空一样治愈 沉静中透着优雅",
        "浅蓝色": "清透得像雨后天空 温柔显白又减龄 带来一身清凉好心情",
        "深蓝色": "沉稳大气又显瘦 经典耐看不挑人 把肌肤衬得更白皙",
        "绿色": "充满生机活力 让人眼前一亮 衬得肌肤白到发光",
        "墨绿色": "复古显白有韵味 沉静优雅惹人回眸 把贵气藏在细节里",
        "黄色": "明媚如阳光般耀眼 活力满满超减龄 点亮一整天的好心情",
        "紫色": "浪漫神秘惹人爱 显白又有女神气质 梦幻得让人心动",
        "杏色": "温柔耐看超百搭 柔和气质缓缓流露 把肤色衬得更通透",
        "卡其色": "随和百搭显质感 经典耐看有格调 温暖大方不挑肤色",
        "酒红色": "浓郁迷人显气场 显白又有女人味 如美酒般让人沉醉",
    },
    "风格": {
        "简约": "越看越有味道 省心又显高级 于无声处彰显品味",
        "性感": "撩人心弦而不张扬 让女人味满分 举手投足都是魅力",
        "休闲": "让出街轻松无压力 穿出松弛好状态 自在舒适不拘束",
        "复古": "仿佛老电影般迷人 散发出岁月沉淀的韵味 经典耐看又有格调",
        "清新": "宛如春风拂面 让人一眼心动 减龄又讨人喜欢",
        "潮": "让你走在时尚前沿 个性十足超吸睛 酷劲十足不撞款",
        "青春": "让人秒回学生时代 活力四射超减龄 元气满满惹人爱",
        "街头": "酷感十足超有型 穿出不羁的个性 让你成为街拍焦点",
        "文艺": "如诗歌般耐人寻味 恬静温柔有故事 让气质与众不同",
        "运动": "活力满格超带劲 让每一步都轻快有力 穿出阳光好状态",
        "知性": "优雅从容有内涵 让气质由内而外 大方得体惹人赞",
        "淑女": "温婉动人惹人怜爱 尽显端庄好仪态 让优雅写在每个细节里",
        "英伦": "绅士感与优雅并存 经典隽永有格调 尽显从容的绅士腔调",
        "通勤": "干练得体显气质 轻松应对职场每一天 利落大方又有亲和力",
    },
    "图案": {
        "线条": "流畅利落显身形 让比例更加修长 勾勒出清晰的层次",
        "印花": "活泼吸睛惹人爱 为整体注入满满活力 俏皮灵动不单调",
        "撞色": "视觉冲击力十足 让造型瞬间出彩 个性张扬又时髦",
        "条纹": "视觉显瘦又时髦 永远流行又好搭 拉长身形更利落",
        "刺绣": "针针精致显匠心 栩栩如生超惊艳 让质感瞬间提升",
        "纯色": "干净利落更显高级 百搭耐看不挑人 简单却足够打动人",
        "蝴蝶结": "俏皮甜美又减龄 为造型增添少女心 灵动可爱惹人怜",
        "字母": "个性吸睛有态度 为整体增添时髦气息 潮味十足不单调",
        "格子": "学院气息扑面而来 经典耐看有腔调 俏皮减龄又好搭",
        "碎花": "浪漫如漫步花园 甜美清新惹人爱 把春日气息穿上身",
        "波点": "俏皮灵动又减龄 摩登又有趣 甜美得恰到好处",
        "卡通": "童趣十足超减龄 让人一秒找回童心 可爱吸睛惹人爱",
        "几何": "摩登感十足 富有艺术气息 让造型层次分明",
    },
    "领型": {
        "圆领": "修饰脸型更显小 经典耐看又百搭 温柔勾勒颈部线条",
        "v领": "拉长颈部显脸小 微露锁骨更迷人 修饰脸型显气质",
        "翻领": "大方利落显精神 经典有型不挑脸型 衬出干练好气场",
        "立领": "修长脖颈更显优雅 挺括有型提气质 干练中透着小俏皮",
        "高领": "保暖又显气质 贴合颈部优雅迷人 衬得脸型更加小巧",
        "一字领": "秀出迷人香肩 让肩颈线条美到发光 散发出浓浓女人味",
        "方领": "把锁骨衬得精致动人 显得脖颈修长优雅 自带宫廷般的浪漫",
        "娃娃领": "乖巧减龄超可爱 衬得脸庞更小巧 让甜美指数飙升",
        "polo领": "精神利落显活力 清爽减龄又好穿 兼顾得体与随性",
        "西装领": "干练有型显气场 衬出职场好气质 利落又不失优雅",
    },
    "袖长": {
        "无袖": "清凉自在显手臂修长 让整体更加轻盈 大方秀出纤细手臂",
        "短袖": "清爽利落又显活力 露出纤细小臂 巧妙遮住拜拜肉",
        "五分袖": "遮住手臂小赘肉 利落又显瘦 长短刚好更显精神",
        "七分袖": "露出纤细手腕更显瘦 利落灵动好气质 多一分优雅少一分拘束",
        "长袖": "修饰手臂显纤细 温暖舒适又百搭 呵护双臂更安心",
    },
    "袖型": {
        "喇叭袖": "灵动飘逸惹人爱 衬得手腕更纤细 举手间浪漫满溢",
        "灯笼袖": "蓬松立体遮手臂 复古浪漫又显瘦 可爱里透着优雅",
        "泡泡袖": "甜美减龄像小公主 遮住手臂小缺点 把少女感拉满",
        "落肩袖": "慵懒随性不挑肩型 弱化肩部更显瘦 带来松弛舒适的穿着感",
        "蝙蝠袖": "随性洒脱有个性 遮肉显瘦超实力 抬手之间自在舒展",
        "插肩袖": "修饰肩部更显瘦 活动自如不紧绷 利落又显运动活力",
    },
    "腰型": {
        "高腰": "瞬间拉高腰线显腿长 让双腿看起来笔直修长 收住小腹更显瘦",
        "松紧腰": "弹力十足不勒肚子 包容各种身材 穿脱方便又自在",
    },
    "款式": {
        "拼接": "层次丰富有看点 打破单调更吸睛 让设计感瞬间提升",
        "收腰": "掐出迷人小蛮腰 凸显窈窕好身段 让腰身更显纤细",
        "不规则": "个性灵动不撞款 打破常规更有型 让时髦度直线上升",
        "抽褶": "立体灵动有层次 遮肉显瘦很贴心 增添一份浪漫情调",
        "口袋": "实用又有型 随手一插就是街拍感 方便收纳又添设计感",
        "纽扣": "精致小巧显品质 为整体添上点睛一笔 复古又有细节感",
        "抽绳": "可随意调节松紧 增添一份随性活力 实用又显个性",
        "连帽": "活力减龄又防风 休闲百搭更显脸小 带来满满青春感",
        "绑带": "个性灵动有看点 飘逸随性惹人爱 让造型更有变化",
        "腰带": "勾勒纤细腰身 提高腰线显腿长 让比例更加完美",
        "流苏": "随步伐摇曳生姿 浪漫洒脱有风情 为造型增添灵动美",
        "木耳边": "俏皮甜美有层次 为整体增添浪漫气息 精致灵动惹人爱",
        "亮片": "闪耀夺目超吸睛 在灯光下熠熠生辉 让你自带星光",
        "破洞": "个性不羁超有型 增添一份洒脱酷劲 透气又吸睛",
        "罗纹": "弹力舒适更贴合 细腻有质感 温暖又有型",
    },
    "下摆": {
        "荷叶边": "灵动飘逸惹人爱 随步伐轻盈摇曳 浪漫甜美有层次",
        "开叉": "走动间秀出美腿 性感得恰到好处 灵动迷人不拘束",
        "花边": "精致甜美惹人爱 为整体增添小浪漫 把女人味轻轻勾勒",
        "垂坠": "显瘦又有高级感 飘逸优雅显身形 行走间线条流畅",
        "层叠": "蓬松俏皮有层次 遮肉显瘦又灵动 如花瓣般浪漫绽放",
        "压褶": "立体有型显精致 随步伐轻轻舞动 优雅又有型",
    },
    "裙型": {
        "a字": "巧妙遮住胯宽腿粗 显瘦显腿长 俏皮又不失优雅",
        "百褶": "灵动减龄有活力 随步伐翩翩起舞 显瘦遮肉好实力",
        "大裙摆": "转身便是一幅画 如公主般浪漫优雅 遮住大腿小赘肉",
        "鱼尾裙": "把曼妙曲线衬得恰到好处 优雅妩媚有风情 摇曳间女人味十足",
        "包臀裙": "凸显迷人身段 把曲线展现得恰到好处 性感又不失端庄",
        "直筒裙": "利落显瘦不挑身材 干练大方显气质 随性又有型",
    },
    "裤长": {
        "九分裤": "露出纤细脚踝更显瘦 利落显高有精神 让腿长优势一目了然",
        "七分裤": "清凉自在又显腿细 露出小腿更轻盈 俏皮利落有活力",
        "长裤": "修饰腿型更显长 把双腿拉得笔直修长 尽显大长腿气场",
    },
    "裤口": {
        "小脚": "贴合脚踝更显瘦 利落有型好搭鞋 把腿型衬得笔直",
        "毛边": "个性随性有态度 打破单调更时髦 粗犷中透着洒脱",
        "开叉": "走动间灵动有型 修饰脚踝显腿长 个性十足不单调",
        "微喇裤": "修饰小腿显腿长 复古迷人有风情 优雅遮肉更显瘦",
        "卷边": "俏皮减龄有活力 露出脚踝更显高 随性又有细节感",
    },
    "衣长": {
        "短款": "提高腰线显腿长 利落显高超精神 小个子也能穿出好比例",
        "中长款": "遮臀显瘦两不误 走出自信好气场 优雅又显高挑",
    },
    "门襟": {
        "拉链": "顺滑好穿脱 利落有型显个性 随开随合更自在",
        "系带": "灵动飘逸有看点 可随心打造造型 增添一份柔美气息",
        "单排扣": "简洁大方显利落 经典耐看有品质 勾勒出修长身形",
        "双排扣": "复古有型显气场 沉稳优雅有腔调 让整体更加挺括",
    },
}

# For each group: frames that start with the attribute, and frames that start with a verb and end in a comma.
FRAMES = {
    "版型": ("{v}的版型 {v}版型 {v}的廓形", "采用{v}的版型 选择讨喜的{v}版型"),
    "材质": ("{v}面料 优质的{v}面料 考究的{v}材质", "精选{v}面料 选用上乘的{v}材质"),
    "颜色": ("{v}的色调 一抹{v} 耐看的{v} 整身{v}", "选用迷人的{v} 以{v}作为主色"),
    "风格": ("{v}的气息 满满的{v}格调 {v}风格", "融入{v}元素 主打{v}风格 演绎{v}风情"),
    "图案": ("{v}设计 吸睛的{v}元素 巧妙的{v}设计", "加入{v}元素 大胆运用{v}设计"),
    "领型": ("{v}设计 精致的{v} 别致的{v}", "领口采用{v}设计 领口特意做成{v}"),
    "袖长": ("{v}设计 利落的{v} 贴心的{v}设计", "采用{v}设计 选择好穿的{v}"),
    "袖型": ("{v}设计 灵动的{v} 时髦的{v}", "袖子做成{v} 采用{v}设计"),
    "腰型": ("{v}设计 贴心的{v} 人性化的{v}设计", "采用{v}设计 腰部选用{v}"),
    "款式": ("{v}设计 {v}细节 别致的{v}设计", "加入{v}设计 融入{v}细节"),
    "下摆": ("{v}下摆 别致的{v}下摆 轻盈的{v}下摆", "下摆采用{v}设计 下摆融入{v}细节"),
    "裙型": ("{v}的轮廓 {v}的剪裁 经典的{v}廓形", "选择{v}的廓形 采用{v}剪裁"),
    "裤长": ("{v}的长度 经典的{v}长度", "选择{v}的长度 采用{v}的长度"),
    "裤口": ("{v}裤口 别致的{v}裤口", "选择{v}裤口 特意做成{v}裤口"),
    "衣长": ("{v}设计 {v}的衣长 利落的{v}剪裁", "采用{v}设计 选择{v}的衣长"),
    "门襟": ("{v}设计 前襟的{v} 精巧的{v}设计", "前襟采用{v}设计 配上{v}门襟"),
}
SHOWN = {"棉": "纯棉", "潮": "潮流", "微喇裤": "微喇"}  # values with another form in the frames

OPENINGS = [
    "想要轻松穿出{mood}，这{q}{noun}一定不要错过。",
    "衣橱里怎么能少了一{q}{adj}的{noun}呢？",
    "{scene}穿什么？这{q}{adj}的{noun}给你满分答案。",
    "换季必入的一{q}{noun}，{adj}又好搭，让{mood}藏也藏不住。",
    "第一眼就会爱上的{noun}，{adj}到让人挪不开眼。",
    "谁说{scene}不能穿得{adj}？一{q}{noun}就能帮你搞定。",
    "穿上这{q}{noun}，{mood}自然流露，{scene}也更有底气。",
    "把{mood}穿在身上，其实只需要一{q}{adj}的{noun}。",
    "这{q}{noun}实力圈粉，{scene}时上身就是人群焦点。",
    "姐妹们看过来，这{q}{noun}{adj}又显气质，{scene}首选！",
    "会说话的{noun}就是它，{adj}的外表让你{scene}时自带{mood}。",
    "一{q}{adj}的{noun}，足以点亮你的{scene}造型。",
    "爱美的你，一定会为这{q}{adj}的{noun}心动不已。",
    "今年的人气{noun}来啦，{scene}穿它，{mood}说来就来！",
    "{mood}满分的{noun}，轻松承包你的{scene}穿搭。",
    "厌倦了千篇一律的打扮，不妨试试这{q}{adj}的{noun}。",
    "{scene}的日子里，一{q}{adj}的{noun}最懂你的心。",
    "还在为{scene}穿搭发愁？这{q}{noun}让你{mood}爆棚。",
    "一眼心动的{noun}，上身就能收获满满{mood}。",
    "想做人群中{adj}的那一个？快来认识这{q}{noun}吧！",
]
CLOSINGS = [
    "随手搭配{match}，就能轻松穿出{mood}。",
    "无论{scene}还是{scene2}，都能让你成为全场焦点。",
    "配上{match}出门，{scene}时回头率直线上升。",
    "喜欢的姐妹赶紧入手，{scene}、{scene2}都能穿得{adj}！",
    "心动就别犹豫，快把这份{mood}带回家吧！",
    "{scene}时穿上它，{mood}立刻升级。",
    "一{q}多搭，{scene}也能穿出{mood}，值得拥有。",
    "再配{match}，整个人{adj}又有气质，怎么拍都上镜。",
    "{adj}又好搭，{match}和{match2}都是它的好搭档。",
    "入手这一{q}，{scene}再也不愁没得穿！",
    "这样的{noun}谁穿谁{adj}，快来感受它的魅力吧！",
    "与{match}是天生一对，{scene}也能穿得{adj}。",
    "上身那一刻，{mood}扑面而来，{scene}就选它！",
    "不挑身材不挑年龄，搭上{match}，谁都能收获{mood}。",
    "从{scene}到{scene2}，{mood}始终在线。",
    "好穿又好搭，{scene}就让它陪你闪亮登场吧！",
    "把这{q}{noun}收进衣橱，{scene}、{scene2}都能轻松应对。",
    "简单搭上{match}，{scene}时的你一定{adj}极了。",
    "好衣不等人，喜欢{mood}的你千万别错过！",
    "选它就对了，{scene}的每一刻都闪闪发光。",
]
MOODS = "好气质 时髦感 自信魅力 高级感 迷人气场 独特品味 女神范儿 元气感 氛围感 松弛感 精致感 优雅风采"
ADJECTIVES = "吸睛 时髦 出挑 出众 精致 讨喜 有型 亮眼 高级 洋气 好看 迷人"
SCENES = "约会 逛街 上班 聚会 出游 度假 聚餐 郊游 看展 旅行 拍照 下午茶"
MATCHES = {
    "上衣": "高腰牛仔裤 阔腿裤 半身裙 小脚裤 百褶裙 直筒裤 小白鞋",
    "裙": "高跟鞋 小白鞋 短靴 乐福鞋 小方包 珍珠耳环 草编包",
    "裤": "白衬衫 短款上衣 修身背心 高跟鞋 运动鞋 短靴 乐福鞋",
}
LINKS = ["", "而", "再加上", "更有", "搭配"]  # before a frame that starts with the attribute
VERB_LINKS = ["", "同时"]  # before a frame that starts with a verb

# The order of the attributes in an instruction.
KEY_ORDER = (
    "类型 版型 材质 颜色 风格 图案 衣样式 衣领型 衣长 衣袖长 衣袖型 衣门襟 衣款式 "
    "裙型 裙下摆 裙腰型 裙长 裙袖长 裙领型 裙袖型 裙款式 裤长 裤型 裤款式 裤腰型 裤口"
)

COLORS = " ".join(PERKS["颜色"])
PATTERNS = " ".join(PERKS["图案"])
STYLES = " ".join(PERKS["风格"])
SKIRT = {
    "版型": "显瘦 立体剪裁",
    "材质": "棉 雪纺 针织 蕾丝 网纱 蚕丝 亚麻 丝绒",
    "颜色": COLORS,
    "风格": "简约 性感 休闲 复古 清新 潮 青春 文艺 知性 淑女 通勤",
    "图案": "线条 印花 撞色 条纹 刺绣 纯色 蝴蝶结 格子 碎花 波点 几何",
    "裙型": "a字 百褶 大裙摆 鱼尾裙 包臀裙 直筒裙",
    "裙下摆": "荷叶边 开叉 花边 垂坠 层叠 压褶",
    "裙腰型": "高腰 松紧腰",
    "裙款式": "拼接 不规则 抽褶 口袋 纽扣 绑带 腰带 流苏 木耳边 亮片",
}
DRESS = SKIRT | {
    "版型": "宽松 显瘦 立体剪裁",
    "裙型": "a字 百褶 大裙摆 鱼尾裙",
    "裙腰型": "高腰",
    "裙袖长": "无袖 短袖 五分袖 七分袖 长袖",
    "裙袖型": "喇叭袖 灯笼袖 泡泡袖 蝙蝠袖",
    "裙领型": "圆领 v领 翻领 立领 一字领 方领 娃娃领",
    "裙款式": "拼接 收腰 不规则 抽褶 口袋 纽扣 绑带 腰带 流苏 木耳边 亮片",
}
DENIM = {
    "材质": "",  # the noun already names the material
    "颜色": "黑色 白色 灰色 蓝色 浅蓝色 深蓝色",
    "风格": "简约 休闲 复古 潮 青春 街头",
    "图案": "线条 刺绣 字母 撞色 印花 纯色",
}
DENIM_SKIRT = DENIM | {"裙型": "a字 直筒裙 包臀裙", "裙下摆": "开叉 荷叶边", "裙款式": "口袋 纽扣 破洞 流苏 拼接"}
DENIM_TROUSERS = DENIM | {"裤口": "小脚 毛边 开叉 微喇裤 卷边", "裤款式": "破洞 口袋 纽扣 拼接 流苏 不规则"}
TROUSERS = {
    "版型": "宽松 显瘦 立体剪裁",
    "材质": "棉 雪纺 针织 亚麻 混纺 丝绒",
    "颜色": COLORS,
    "风格": "简约 休闲 复古 潮 青春 街头 文艺 运动 知性 英伦 通勤",
    "图案": "线条 印花 撞色 条纹 刺绣 纯色 字母 格子 几何",
    "裤长": "九分裤 七分裤 长裤",
    "裤款式": "口袋 拼接 抽绳 抽褶 纽扣 绑带 腰带 不规则",
    "裤腰型": "高腰 松紧腰",
    "裤口": "毛边 开叉 卷边",
}
SHORTS = {"裤长": "", "裤口": "毛边 卷边"}
SLIM_LEGS = {"版型": "显瘦 立体剪裁", "裤口": "小脚 开叉 毛边"}
TOP = {
    "版型": "宽松 显瘦 立体剪裁",
    "材质": "棉 混纺",
    "颜色": COLORS,
    "风格": STYLES,
    "图案": PATTERNS,
    "衣领型": "圆领 v领 翻领 立领",
    "衣长": "短款 中长款",
    "衣袖长": "七分袖 长袖",
    "衣袖型": "喇叭袖 灯笼袖 泡泡袖 落肩袖 蝙蝠袖",
    "衣款式": "拼接 收腰 不规则 口袋 纽扣",
}
SPORTY = {
    "风格": "休闲 潮 青春 街头 运动 复古 简约",
    "图案": "印花 撞色 条纹 刺绣 纯色 字母 卡通 线条",
    "衣袖型": "落肩袖 插肩袖 蝙蝠袖",
    "衣款式": "连帽 抽绳 拼接 口袋 不规则 罗纹",
    "衣领型": "圆领 高领 立领",
    "衣袖长": "长袖",
}
COAT = {
    "风格": "简约 休闲 复古 潮 青春 街头 文艺 运动 知性 英伦 通勤",
    "材质": "羊毛 混纺 棉",
    "图案": "线条 撞色 条纹 刺绣 纯色 格子 几何",
    "衣领型": "翻领 立领 西装领",
    "衣门襟": "拉链 系带 单排扣 双排扣",
    "衣袖型": "落肩袖 喇叭袖",
    "衣袖长": "长袖",
    "衣款式": "拼接 收腰 口袋 腰带 不规则",
}
SUIT = COAT | {"风格": "简约 英伦 通勤 复古 知性", "衣领型": "西装领 翻领", "衣门襟": "单排扣 双排扣", "衣袖型": ""}
KNIT = {
    "材质": "羊毛 棉 混纺",
    "风格": "简约 休闲 复古 清新 青春 文艺 知性 淑女",
    "图案": "线条 撞色 条纹 刺绣 纯色 字母 格子 波点 几何",
    "衣领型": "圆领 v领 高领 一字领",
    "衣款式": "拼接 不规则 罗纹 流苏 木耳边",
}
CHIFFON = {
    "材质": "",
    "风格": "简约 清新 文艺 知性 淑女 通勤 性感",
    "图案": "印花 条纹 刺绣 纯色 蝴蝶结 碎花 波点",
    "衣领型": "圆领 v领 立领 娃娃领 一字领",
    "衣袖长": "无袖 短袖 五分袖 七分袖 长袖",
    "衣款式": "抽褶 木耳边 不规则 绑带 纽扣",
}
SHIRT = {
    "材质": "棉 雪纺 蚕丝 亚麻",
    "衣领型": "翻领 立领 娃娃领 v领",
    "衣袖长": "短袖 五分袖 七分袖 长袖",
    "衣门襟": "单排扣 系带",
}
TEE = SPORTY | {
    "材质": "棉 亚麻",
    "衣领型": "圆领 v领",
    "衣袖长": "短袖 五分袖 长袖",
    "衣款式": "拼接 不规则 破洞 亮片",
}


@dataclass(frozen=True)
class Garment:
    """A kind of garment.

    Attributes:
        noun: its name in a sentence.
        kind: top, skirt or trousers, the value of the attribute 类型.
        identity: the attribute (key#value) that names it.
        features: the other attributes: key -> possible values.
    """

    noun: str
    kind: str
    identity: str
    features: dict[str, str]


GARMENTS = [
    Garment("连衣裙", "裙", "裙长#连衣裙", DRESS),
    Garment("长裙", "裙", "裙长#长裙", DRESS),
    Garment("半身裙", "裙", "裙长#半身裙", SKIRT),
    Garment("短裙", "裙", "裙长#短裙", SKIRT | {"裙型": "a字 百褶 包臀裙"}),
    Garment("牛仔裙", "裙", "裙型#牛仔裙", SKIRT | DENIM_SKIRT),
    Garment("阔腿裤", "裤", "裤型#阔腿裤", TROUSERS | {"裤长": "九分裤 长裤"}),
    Garment("直筒裤", "裤", "裤型#直筒裤", TROUSERS),
    Garment("哈伦裤", "裤", "裤型#哈伦裤", TROUSERS | {"裤长": "九分裤", "裤口": "小脚 卷边"}),
    Garment("铅笔裤", "裤", "裤型#铅笔裤", TROUSERS | SLIM_LEGS),
    Garment("牛仔裤", "裤", "材质#牛仔布", TROUSERS | DENIM_TROUSERS),
    Garment("短裤", "裤", "裤长#短裤", TROUSERS | SHORTS),
    Garment("衬衫", "上衣", "衣样式#衬衫", TOP | SHIRT),
    Garment("卫衣", "上衣", "衣样式#卫衣", TOP | SPORTY),
    Garment("t恤", "上衣", "衣样式#t恤", TOP | TEE),
    Garment("polo衫", "上衣", "衣样式#polo", TOP | TEE | {"衣领型": "polo领"}),
    Garment("棒球服", "上衣", "衣样式#棒球服", TOP | SPORTY | {"衣领型": "立领", "衣门襟": "拉链"}),
    Garment("外套", "上衣", "衣样式#外套", TOP | COAT),
    Garment("风衣", "上衣", "衣样式#风衣", TOP | COAT),
    Garment("西装", "上衣", "衣样式#西装", TOP | SUIT),
    Garment("针织衫", "上衣", "衣样式#针织衫", TOP | KNIT),
    Garment("毛衣", "上衣", "衣样式#毛衣", TOP | KNIT),
    Garment("开衫", "上衣", "衣样式#开衫", TOP | KNIT | {"衣领型": "v领 圆领", "衣门襟": "单排扣 系带"}),
    Garment("雪纺衫", "上衣", "衣样式#雪纺衫", TOP | CHIFFON),
]

# A value of the left and a value of the right do not occur in the same garment.
CLASHES = [
    ("宽松", "收腰 鱼尾裙 小脚 腰带"),
    ("无袖 短袖 五分袖", "喇叭袖 灯笼袖 蝙蝠袖 落肩袖 插肩袖"),
    ("无袖", "泡泡袖"),
    ("纯色", PATTERNS.replace("纯色", "拼接")),
    ("松紧腰", "纽扣 腰带"),
    ("系带", "绑带 腰带"),
    ("立领 高领", "连帽"),
    ("直筒裙 包臀裙 鱼尾裙", "层叠 压褶 抽褶"),
    ("百褶", "抽褶 压褶"),
    ("性感 淑女 知性", "运动 街头 青春 休闲"),
    ("通勤 英伦", "运动 街头 青春 清新"),
    ("性感", "清新 淑女 文艺 青春 娃娃领 卡通"),
    ("简约", "潮 印花 亮片 流苏 卡通 街头"),
]


def clashes(values: list[str]) -> bool:
    """Whether two of the values exclude each other."""
    chosen = set(values)
    return any(chosen & set(left.split()) and chosen & set(right.split()) for left, right in CLASHES)


def draw_features(rng: random.Random, garment: Garment) -> list[tuple[str, str]]:
    """Draw 3 to 6 attributes (key, value) that do not exclude each other; style and pattern may occur twice."""
    keys = [key for key, values in garment.features.items() if values] + ["风格", "图案"]
    while True:
        chosen = rng.sample(keys, rng.randint(3, 6))
        features = [(key, rng.choice(garment.features[key].split())) for key in chosen]
        if len(set(features)) == len(features) and not clashes([value for _, value in features]):
            return features


def write_clause(rng: random.Random, key: str, value: str, linked: bool) -> str:
    """Write the clause for one attribute; a linked clause continues a sentence."""
    group = key if key in PERKS else key[1:]
    perk = rng.choice(PERKS[group][value].split())
    noun_frames, verb_frames = (frames.split() for frames in FRAMES[group])
    frame = rng.choice(noun_frames + verb_frames)
    is_verb = frame in verb_frames
    link = rng.choice(VERB_LINKS if is_verb else LINKS) if linked else ""
    return link + frame.format(v=SHOWN.get(value, value)) + ("，" if is_verb else "") + perk


def write_body(rng: random.Random, features: list[tuple[str, str]]) -> str:
    """Write one clause for each attribute, in sentences of one or two clauses."""
    body = ""
    while features:
        size = rng.choice([1, 2, 2])
        clauses = [write_clause(rng, *feature, linked=i > 0) for i, feature in enumerate(features[:size])]
        body += "，".join(clauses) + "。"
        features = features[size:]
    return body


def write_copy(rng: random.Random, garment: Garment, features: list[tuple[str, str]]) -> str:
    """Write the advertisement: an opening, the attributes, a closing sentence."""
    moods, adjectives = rng.sample(MOODS.split(), 2), rng.sample(ADJECTIVES.split(), 2)
    scenes, matches = rng.sample(SCENES.split(), 3), rng.sample(MATCHES[garment.kind].split(), 2)
    named = {"noun": garment.noun, "q": "件" if garment.kind == "上衣" else "条"}
    named |= {"scene2": scenes[2], "match": matches[0], "match2": matches[1]}
    opening = rng.choice(OPENINGS).format(**named, mood=moods[0], adj=adjectives[0], scene=scenes[0])
    closing = rng.choice(CLOSINGS).format(**named, mood=moods[1], adj=adjectives[1], scene=scenes[1])
    return opening + write_body(rng, features) + closing


def write_instruction(garment: Garment, features: list[tuple[str, str]]) -> str:
    """Join the type, the naming attribute and the other attributes in ADGEN's format: key#value*key#value."""
    order = KEY_ORDER.split()
    attributes = [f"类型#{garment.kind}", garment.identity, *(f"{key}#{value}" for key, value in features)]
    return "*".join(sorted(attributes, key=lambda attribute: (order.index(attribute.split("#")[0]), attribute)))


def make_row(rng: random.Random) -> dict[str, str]:
    """Draw a garment with attributes and write its advertisement, until it has MIN_CHARS to MAX_CHARS characters."""
    while True:
        garment = rng.choice(GARMENTS)
        features = draw_features(rng, garment)
        output = write_copy(rng, garment, features)
        if MIN_CHARS <= len(output) <= MAX_CHARS:
            return {"instruction": write_instruction(garment, features), "output": output}


def make_rows(num_rows: int, seed: int) -> list[dict[str, str]]:
    """Make `num_rows` rows with different instructions; the same seed gives the same rows."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < num_rows:
        row = make_row(rng)
        rows.setdefault(row["instruction"], row)
    return list(rows.values())


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write the sample data set.")
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="Folder for train.jsonl and dev.jsonl.")
    parser.add_argument("--num_train", type=int, default=3000, help="Rows in train.jsonl.")
    parser.add_argument("--num_dev", type=int, default=200, help="Rows in dev.jsonl.")
    parser.add_argument("--seed", type=int, default=42, help="Seed of the generator; the same seed, the same rows.")
    args = parser.parse_args()
    if args.num_train < 1 or args.num_dev < 1:
        parser.error(f"--num_train {args.num_train} and --num_dev {args.num_dev} must both be at least 1")
    return args


@one_line_on_interrupt()
def main() -> None:
    """Write train.jsonl and dev.jsonl."""
    args = parse_args()
    rows = make_rows(args.num_train + args.num_dev, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(args.output_dir / "train.jsonl", rows[: args.num_train])
    write_rows(args.output_dir / "dev.jsonl", rows[args.num_train :])


if __name__ == "__main__":
    main()
